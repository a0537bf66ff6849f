"""The methods, one a file. `opd.method.catalogue()` finds them."""

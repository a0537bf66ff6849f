"""Who can speak or score: exact tables for tests, a model in this process, served engines."""

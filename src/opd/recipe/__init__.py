"""Recipes: what a run is, in YAML.

    load(paths, overrides)   files and `key=value`, later over earlier, as a frozen `Recipe` with origins
    build(data)              the same from plain data, for Python
    dump(recipe)             the YAML of a recipe with its defaults; it loads back equal
    schema()                 the JSON schema of the YAML, for editors

Read in one direction: yaml12 (text to tree), layers (several trees to one), settle (shorthands and stages), files
(paths), resolve (types, arguments of methods, all problems at once in the words of `explain`).
"""

from opd.recipe.resolve import Resolved, build, dump, load, schema
from opd.recipe.sections import (
    Critic,
    Data,
    Eval,
    Method,
    Recipe,
    Reward,
    Run,
    Source,
    Speak,
    Stage,
    StageCritic,
    Student,
    Teacher,
    Train,
    Update,
)

__all__ = [
    "Critic", "Data", "Eval", "Method", "Recipe", "Resolved", "Reward", "Run", "Source", "Speak", "Stage",
    "StageCritic", "Student", "Teacher", "Train", "Update", "build", "dump", "load", "schema",
]  # fmt: skip

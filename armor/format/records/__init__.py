"""The JSON between stages, a type for each file: written and read through it, with units in the texts of its fields.

A record of another version, or one that lacks something, is refused in one line that says what to run again. The page
docs/RECORDS.md is made from these types.
"""

"""The verbs of the `dinojax` command, one file each; `add_parser` in it says what it takes."""

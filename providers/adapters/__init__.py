"""One file per upstream. They do not import each other."""

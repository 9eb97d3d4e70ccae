"""Episodes on disk: one file each, in a directory that says by names and sizes what it holds."""

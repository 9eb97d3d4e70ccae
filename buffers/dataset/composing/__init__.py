"""Several datasets as one: a mixture (a source), and one that extends another (a sink)."""

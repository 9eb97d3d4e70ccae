"""Pictures, tables, `inspect` and the demo."""

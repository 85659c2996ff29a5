"""What to edit: where a behaviour comes from."""

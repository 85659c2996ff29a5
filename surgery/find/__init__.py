"""What to edit: where a behaviour comes from, as recipes with effects that hold on other prompts."""

"""Which prompts a search runs, and which next tokens it watches."""

"""How much each candidate does: published scores, of a live model or of weights alone."""

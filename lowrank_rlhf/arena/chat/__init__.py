"""Who can answer, and several of them answering at once from the one base."""

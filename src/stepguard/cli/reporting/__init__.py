"""The content of ``stepguard report``: what is gathered of a run, its charts, and the page."""

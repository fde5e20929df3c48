"""Which engine gets a request: what is known of each, and how one is chosen."""

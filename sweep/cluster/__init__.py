"""Where units of work run: nodes, processes, and the store of what is done."""

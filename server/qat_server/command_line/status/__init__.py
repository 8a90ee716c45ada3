"""`qat-plugin status`: fetches a running server's /status and shows it on a terminal or as JSON."""

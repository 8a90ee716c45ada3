"""`qat-plugin doctor`: what a node or VM lacks for the plugin, and what to do about it."""

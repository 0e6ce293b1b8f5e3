"""The live page: static files that `routes` serves as they are. No build step, nothing from elsewhere."""

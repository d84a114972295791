"""Every way in for people and programs."""

"""What is trained for a domain, and how."""

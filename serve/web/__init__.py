"""What both servers, of the API and of the page, keep out: other origins, other names, floods."""

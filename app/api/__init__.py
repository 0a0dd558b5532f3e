"""The HTTP API: authentication, routes, and the service that they share with the page."""

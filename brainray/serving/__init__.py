"""The service over HTTP: requests in, answers out, on Ray Serve."""

"""The seed's three verbs (send, receive, close) for every URL."""

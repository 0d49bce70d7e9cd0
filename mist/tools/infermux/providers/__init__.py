"""Adapters: what turns a ChatRequest into a provider's wire format and its answers back."""

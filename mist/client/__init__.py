"""The pleasant layer, in envelopes: publish, replay, subscribe, workers."""

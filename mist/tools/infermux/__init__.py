"""InferMux: one door to many model providers, with routing, budgets, and answers recorded for replay."""

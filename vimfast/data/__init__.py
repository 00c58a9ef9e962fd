"""From a path to batches: a loader is a source, an order, a view and a way of decoding."""

"""The ops: public functions, and what torch needs to know of each (shapes, gradients, autocast). One file an op."""

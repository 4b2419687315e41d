"""Recurrent layers on examples laid end to end, forward and backward: each example begins anew."""

"""Tokens -> optimiser steps -> batches. Only `collate` needs torch."""

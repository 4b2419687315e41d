"""Optimiser steps that obey a plan, on transformers' Trainer."""

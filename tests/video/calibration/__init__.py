"""Tests of diffusers_hook.calibration."""

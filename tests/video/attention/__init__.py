"""Tests of the video hook."""

"""Limits on connections, which the hub and the API share: how many to accept, and which to
close when it is full.
"""

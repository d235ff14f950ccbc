"""Signed HTTP POSTs that tell others that a resource has ended, in the scheme of Standard Webhooks 1.0.

https://github.com/standard-webhooks/standard-webhooks
"""

"""Formal languages: tables, their exact denoiser and everything that is known of them."""

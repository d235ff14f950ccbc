"""Records to chat, chat to tokens and loss mask; without torch and transformers."""

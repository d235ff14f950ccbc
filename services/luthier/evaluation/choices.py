"""How many texts a record's answer may be chosen between: what the service allows and its worker keeps to."""

MAX_CHOICES = 64
MAX_CHOICE_CHARACTERS = 1000

"""Texts on which tokenizers that are not the same show it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

_SENTENCES = (
    "The quick brown fox can't jump over we'll, they're, I'd, IT'S or o'clock.",
    "Größe, naïve café, Ångström, Łódź, İstanbul, straße, œuvre, ﬁne ﬂow, ½ ² ℌ Å",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "हिन्दी में क्षत्रिय और श्री लिखना, বাংলা ভাষা, தமிழ் மொழி",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ ພາສາລາວ ភាសាខ្មែរ",
    "我能吞下玻璃而不伤身体。日本語のカタカナとひらがな、全角ＡＢＣ１２３。",
    "키스의 고유조건은 입술끼리 만나야 하고 각각",
    "ქართული ენა, հայերեն, አማርኛ, ᏣᎳᎩ, 𐍅𐌿𐌻𐍆𐌹𐌻𐌰",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 ☕️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️‍🔥 ∀x∈ℝ: ⌈x⌉ = −⌊−x⌋ ⇒ 𝒜𝓑",
    "def f(x: int = 0) -> None:\n\tif x != 1_000:\n        return {'a': [1, 2.5e-3], \"b\": None}  # ok\n",
    'for (int i=0;i<n;++i){ s+="\\n"; }  /* <p class="x">&amp;</p> */ $x = @y ?? `z`;',
    "https://example.org/a-b_c?d=1&e=%20#f user.name+tag@example.com C:\\Users\\me\\~",
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000.50 -42 1e10 0x1F 2024-01-31 ٣٤٥ ४५ ½",
)
_SPACES = (
    "",
    " ",
    "  ",
    "   leading, and trailing   ",
    " leading",
    "trailing ",
    "two  three   four    seventeen                 end",
    "\n",
    "\n\n",
    "a\nb\n\nc\n\n\nd\r\ne\rf",
    "\ttab\t\ttabs \t mixed\n \n  \n",
    "line \n next\n  indented\n",
    "a\u00a0b\u2003c\u3000d\u200be\u2028f\ufeffg\u00adh",
    "null\x00bell\x07escape\x1bdelete\x7f",
)
_COMPOSED = "é ñ ü Å ệ ạ̈ が ｶﾞ 각 ﬃ ① ㎏ ſ"


def probe_texts(added_tokens: Iterable[str]) -> list[str]:
    """Return the texts, with every added token of a tokenizer alone, between letters and among spaces.

    They hold many scripts, digits, runs of spaces, line ends, tabs, control characters, emoji, code, and combining
    marks in the four normal forms.
    """
    forms = [unicodedata.normalize(form, _COMPOSED) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    tokens = [text for token in added_tokens for text in (token, f"a{token}b {token} \n{token}\n ")]
    return [*_SENTENCES, *_SPACES, *forms, *tokens]

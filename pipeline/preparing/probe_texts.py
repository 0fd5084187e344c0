"""Texts that normalizers, pre-tokenizers and added tokens treat differently."""

# A tokenizer's fingerprint is a hash of their ids: changing these texts changes all fingerprints.
PROBES = (
    "",
    " ",
    "   two   spaces   and more    ",
    "\n",
    "\n\n\n a line \r\n and another \t\ttab\t",
    "Hello world",
    " Hello world",
    "hello, WORLD! It's 3.14159 o'clock; 1234567890 12,345.67 -- 'quoted' \"twice\" (and) [so] {on} <tag> & more...",
    "don't you'll we've I'm they'd",
    "naïve café \u0065\u0301 ﬁ ﬂ Å Å ½ ① Ⅳ ²",
    "中文字符\uff0c日本語のテキスト。한국어 텍스트",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก",  # noqa: RUF001
    "😀👩\u200d👩\u200d👧\u200d👦🇩🇪👍🏽 ❤\ufe0f",
    "می\u200cخواهم \u200b\u00a0\u2028\ufeff\u0000\u0007",  # noqa: RUF001
    "def f(x):\n    if x > 0:\n\t\treturn x ** 2  # comment\n    return None\n\n```python\nprint('hi')\n```\n",
    "https://example.org/a/b?c=d&e=%20f user@example.org C:\\path\\file.txt $x^2 + \\frac{1}{2}$",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s>",
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><bos><start_of_turn>model\n<end_of_turn>",
    "▁▁under Ġspace ##ing <0x0A> <unk> <pad> [MASK]",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!!!!----------------================",
)

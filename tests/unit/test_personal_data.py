"""Personal data and secrets are found by form, checksum and context; look-alikes are left alone."""

from __future__ import annotations

import time

import pytest

from heldout.pipeline.checks import Parts
from heldout.pipeline.checks.identifiers import scan
from heldout.pipeline.checks.national_ids import luhn
from heldout.pipeline.checks.personal import find_personal_data
from heldout.pipeline.types import Dataset, Finding

from .conftest import example


def found(*texts: str, name: str = "train.jsonl") -> list[Finding]:
    rows = tuple(example(text, "ok", line) for line, text in enumerate(texts, start=1))
    return list(find_personal_data(Parts(train=Dataset(name=name, examples=rows))))


@pytest.mark.parametrize(
    ("type_", "text"),
    [
        ("email", "mail Anna-Lena.Huber@uni-example.ac.at please"),
        ("phone", "ring me on 07700 900123 after six"),
        ("phone", "Meine Nummer ist 030 23125 042."),
        ("phone", "Appelez-moi au 01 23 45 67 89"),
        ("phone", "WhatsApp +91 98765 43210"),
        ("phone", "tel. (415) 555-0132 ext 4"),
        ("phone", "My cell is 415.555.0132"),
        ("phone", "Phone number: 555 0144"),
        ("card_number", "card 5105-1051-0510-5100 exp 12/26"),
        ("card_number", "6011000990139424"),
        ("iban", "FR14 2004 1010 0505 0001 3M02 606"),
        ("iban", "NL91ABNA0417164300 is the account"),
        ("ip_address", "the server at 203.0.113.77 is down"),
        ("ip_address", "ping 2001:db8:0:1234:0:567:8:1 fails"),
        ("national_id", "my SSN is 078-05-1120"),
        ("national_id", "national insurance AB 12 34 56 C"),
        ("national_id", "DNI 12345678Z"),
        ("national_id", "codice fiscale RSSMRA85T10A562S"),
        ("national_id", "CPF 529.982.247-25"),
        ("national_id", "PESEL 44051401359"),
        ("national_id", "NIR 2 55 08 14 168 025 38"),
        ("national_id", "BSN 111222333"),
        ("passport", "Reisepass Nr. C01X00T47"),
        ("passport", "driver's license number D1234567"),
        ("name_and_birth_date", "I was born on March 3, 1984"),
        ("name_and_birth_date", "Petra Vogel, geboren am 12.05.1961"),
        ("postal_address", "I live at 221B Baker Street"),
        ("postal_address", "Lindenstraße 12, 10969 Berlin"),
        ("postal_address", "J'habite 12 rue de la Paix"),
        ("postal_address", "742 Evergreen Terrace, Springfield, IL 62704"),
        ("secret", "password: hunter2!"),
        ("secret", "The password is correct-horse-42."),
        ("secret", 'api_key = "9f8e7d6c5b4a39281706"'),
        ("secret", "ghp_16C7e42F292c6912E7710c838347Ae178B4a"),
        ("secret", "-----BEGIN RSA PRIVATE KEY----- MIIEpAIBAAKCAQEA1"),
        ("secret", "postgres://admin:s3cr3tPw@db.example.com:5432/app"),
        ("secret", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N"),
        ("secret", "PIN code: 9931"),
    ],
)
def test_each_type_is_told(type_: str, text: str):
    assert [one.type for one in scan(text)] == [type_]


@pytest.mark.parametrize(
    "text",
    [
        "I cannot remember my password, please help within 24 hours",
        "The password must have 8 characters and 1 digit",
        "Use a 10-digit password or token",
        "Invoice 2023-11-0042 of 12 May 2023 for 1,299.00 EUR",
        "Order 123456789 arrived on 2024-01-02 at 10:30:15",
        "Chrome 120.0.6099.109, firmware version 22.41.10.12",
        "the card 4111 1111 1111 1113",  # a wrong check digit
        "GB82WEST12345698765431",
        "ISBN 978-3-16-148410-0, EAN 4006381333931",
        "UUID 550e8400-e29b-41d4-a716-446655440000",
        "commit 9fceb02d0ae598e95dc970b74767f19372d61af8",
        "GPS 48.858370, 2.294481 and pi 3.14159265358979",
        "std::vector<int> at 00:1A:2B",
        "Napoleon of Corsica came on 15 August 1769",
        "Take the 42 bus to King Street",
        "support@shop.example and noreply@x.org",
        "Twitter @handle123 and user@localhost",
        "192.168.0.1 is the router; mask 255.255.255.0",
        "Freephone 0800 123 4567 or 1-800-555-0199",
        "Call 911 or 112 now",
        "population: 1.234.567.890",
        "max_tokens=4096",
        "password=<YOUR_PASSWORD_1>",
        "card ending in 1111",
    ],
)
def test_what_only_looks_alike_is_left_alone(text: str):
    assert scan(text) == ()


def test_all_rows_of_a_file_are_one_warning_that_shows_no_value_whole():
    (finding,) = found(
        "hello", "mail bo.lund@example.net", "hello again", "my password is kN8-tulip and +44 7700 900456"
    )
    assert (finding.code, finding.severity, finding.lines) == ("personal_data", "warning", (2, 4))
    assert "1 email" in finding.message
    assert "1 secret" in finding.message
    assert finding.example == "line 2: email b…@example.net"
    shown = finding.message + finding.example
    assert not any(value in shown for value in ("bo.lund", "tulip", "900456"))


def test_what_stands_in_the_answer_is_found_too():
    rows = (example("who?", "Write to mia.falk@example.org", 7),)
    (finding,) = find_personal_data(Parts(train=Dataset(name="t", examples=rows)))
    assert finding.lines == (7,)


def test_contact_data_in_many_rows_are_public_and_only_noted():
    texts = [f"question {'x' * i}: write to mara.shop@example.org" for i in range(20)]
    personal, public = found(*texts, "I am at mara.home@example.org")
    assert (personal.severity, personal.lines) == ("warning", (21,))
    assert (public.severity, public.lines) == ("note", tuple(range(1, 21)))


def test_of_a_validation_file_nothing_is_learned_so_it_is_a_note():
    rows = (example("mail bo.lund@example.net", "ok", 1),)
    train = Dataset(name="train", examples=(example("hi", "ok", 1),))
    (finding,) = find_personal_data(Parts(train=train, valid=Dataset(name="valid", examples=rows)))
    assert (finding.severity, finding.file) == ("note", "valid")


def test_the_check_digit_of_a_card():
    assert luhn("79927398713")
    assert not luhn("79927398710")


@pytest.mark.parametrize("piece", ["1", "1 ", "a1@", "Aa 1 ", "1.", "a:1", "1call ", "1key=", "x1@a.", "eyJ1", "1-"])
def test_a_long_text_takes_time_in_proportion(piece: str):
    def seconds(length: int) -> float:
        text = piece * (length // len(piece))
        started = time.perf_counter()
        scan(text)
        return time.perf_counter() - started

    short = min(seconds(20_000) for _ in range(3))
    assert seconds(160_000) < 40 * short + 0.5  # 8 times as long; quadratic would be 64 times

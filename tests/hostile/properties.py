"""Every property by name: what Hypothesis and the fuzzer run."""

from collections.abc import Callable, Mapping
from typing import Final

from tests.hostile import devices, logins, wire, words

Property = Callable[[bytes], None]

PROPERTIES: Final[Mapping[str, Property]] = {
    "framing": wire.framing,
    "headers": wire.headers,
    "text": wire.text,
    "initiator_login": logins.initiator_login,
    "target_login": logins.target_login,
    "sense_data": devices.sense_data,
    "vital_product_data": devices.vital_product_data,
    "parameter_data": devices.parameter_data,
    "probing": devices.probing,
    "urls": words.urls,
    "secrets": words.secrets,
    "options": words.options,
    "addresses": words.addresses,
}

"""Settings of a mount: what they are, where they come from, how they are shown.

* `settings`: the frozen structures that everything below the command line is given.
* `words`: the vocabulary of INTERFACE §5; one word is an `-o` option, a TOML key and a URL key.
* `values`: how the text of each becomes a value.
* `sources`: `-o` strings and TOML files become words, later ones win.
* `build`: words become a `MountConfig`; secrets are read from their files.
* `tls`: a `TlsConfig` becomes an SSL context; what is wrong with its files, in words.
* `render`: a `MountConfig` becomes the TOML that `.orion/config.toml` shows.
* `places`: the folders of INTERFACE §1.
"""

from orion_iscsifs.config.settings import (
    AuthConfig,
    CacheConfig,
    CacheMode,
    ChapAlgorithm,
    ChapCredentials,
    Destage,
    DigestPreference,
    FuseConfig,
    LuksConfig,
    MountConfig,
    MultipathConfig,
    PathPolicy,
    ReserveConfig,
    ReserveMode,
    Secret,
    SecretBytes,
    SessionConfig,
    TierConfig,
    TierReuse,
    TlsConfig,
)

__all__ = [
    "AuthConfig",
    "CacheConfig",
    "CacheMode",
    "ChapAlgorithm",
    "ChapCredentials",
    "Destage",
    "DigestPreference",
    "FuseConfig",
    "LuksConfig",
    "MountConfig",
    "MultipathConfig",
    "PathPolicy",
    "ReserveConfig",
    "ReserveMode",
    "Secret",
    "SecretBytes",
    "SessionConfig",
    "TierConfig",
    "TierReuse",
    "TlsConfig",
]

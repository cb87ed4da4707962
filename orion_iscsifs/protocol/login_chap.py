"""The CHAP exchange of a login, both roles (RFC 7143 §§9.2.1, 12.1.3).

    initiator                                 target
    AuthMethod=CHAP                      ->
                                         <-   AuthMethod=CHAP
    CHAP_A=7,5   (in a PDU of its own)   ->
                                         <-   CHAP_A CHAP_I CHAP_C
    CHAP_N CHAP_R [CHAP_I CHAP_C]        ->
                                         <-   [CHAP_N CHAP_R]

Each class takes the keys of a step and gives those of the next. Whatever does not fit the step
ends the login: a missing CHAP_R that is let pass is how a reflection attack begins (§9.2).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from orion_iscsifs.errors import AuthenticationFailed, ProtocolViolation
from orion_iscsifs.protocol.chap import (
    ChallengeRegister,
    ChapAlgorithm,
    Credentials,
    chap_response,
    decode_binary,
    encode_binary,
    same,
)
from orion_iscsifs.protocol.login_status import LoginStatus, status_error
from orion_iscsifs.protocol.pdu import LoginRequest, LoginResponse
from orion_iscsifs.protocol.text import Pair, parse_number, shown

_SECTION: Final = "12.1.3"
RandomBytes = Callable[[int], bytes]
"""A cryptographically secure source: `count` to that many bytes."""


class _Keys:
    """The CHAP keys of one step, taken one by one; what is left over was not asked for."""

    def __init__(self, keys: Mapping[str, str], pdu: str) -> None:
        self._keys = dict(keys)
        self._pdu = pdu

    def take(self, key: str) -> str:
        value = self._keys.pop(key, None)
        if value is None:
            if self._pdu == LoginRequest.name:
                raise status_error(LoginStatus.MISSING_PARAMETER, f"{self._pdu}: {key} is missing")
            raise ProtocolViolation(self._pdu, f"{key} is missing", section=_SECTION)
        return value

    def take_binary(self, key: str) -> bytes:
        return decode_binary(self.take(key), key=key, pdu=self._pdu)

    def take_response(self, algorithm: ChapAlgorithm) -> bytes:
        response = self.take_binary("CHAP_R")
        if len(response) != algorithm.response_bytes:
            problem = f"CHAP_R holds {len(response)} bytes, {algorithm.name} gives "
            problem += str(algorithm.response_bytes)
            raise ProtocolViolation(self._pdu, problem, section=_SECTION)
        return response

    def take_identifier(self) -> int:
        number = parse_number(self.take("CHAP_I"))
        if number is None or number > 255:
            raise ProtocolViolation(self._pdu, "CHAP_I is not a byte", section=_SECTION)
        return number

    def has(self, key: str) -> bool:
        return key in self._keys

    def finish(self) -> None:
        if self._keys:
            problem = f"{next(iter(self._keys))} does not belong to this step of CHAP"
            raise ProtocolViolation(self._pdu, problem, section=_SECTION)


def _challenge(algorithm: ChapAlgorithm, random_bytes: RandomBytes) -> tuple[int, bytes]:
    return random_bytes(1)[0], random_bytes(algorithm.response_bytes)


class ChapInitiator:
    """Proves who we are; with `target_credentials` demands the same of the target."""

    def __init__(
        self,
        credentials: Credentials,
        target_credentials: Credentials | None,
        algorithms: Sequence[int],
        random_bytes: RandomBytes,
        challenges: ChallengeRegister | None = None,
    ) -> None:
        self._sent = ChallengeRegister() if challenges is None else challenges
        self._credentials = credentials
        self._target = target_credentials
        self._algorithms = tuple(ChapAlgorithm(algorithm) for algorithm in algorithms)
        self._random_bytes = random_bytes
        self._algorithm = self._algorithms[0]
        self._identifier = 0
        self._challenge = b""

    @property
    def mutual(self) -> bool:
        return self._target is not None

    def propose(self) -> list[Pair]:
        """CHAP_A, the algorithms in the order of preference."""
        return [("CHAP_A", ",".join(str(int(item)) for item in self._algorithms))]

    def answer(self, received: Mapping[str, str]) -> list[Pair]:
        """The target's CHAP_A, CHAP_I, CHAP_C to our CHAP_N, CHAP_R and perhaps a challenge."""
        keys = _Keys(received, LoginResponse.name)
        self._algorithm = self._chosen(keys.take("CHAP_A"))
        identifier, challenge = keys.take_identifier(), keys.take_binary("CHAP_C")
        keys.finish()
        if challenge in self._sent:
            raise AuthenticationFailed(
                "login: the target reflects a CHAP challenge of ours from another connection",
                advice="somebody may be impersonating the target (RFC 7143 §9.2.1)",
            )
        secret = self._credentials.secret
        response = chap_response(self._algorithm, identifier, secret, challenge)
        pairs = [("CHAP_N", self._credentials.user), ("CHAP_R", encode_binary(response))]
        if self._target is not None:
            self._identifier, self._challenge = _challenge(self._algorithm, self._random_bytes)
            if same(self._challenge, challenge):
                # Chance does not do this: the target has foreseen, or replays, our randomness.
                raise AuthenticationFailed("login: the target's CHAP challenge equals ours")
            self._sent.add(self._challenge)
            pairs += [
                ("CHAP_I", str(self._identifier)),
                ("CHAP_C", encode_binary(self._challenge)),
            ]
        return pairs

    def _chosen(self, text: str) -> ChapAlgorithm:
        number = parse_number(text)
        for algorithm in self._algorithms:
            if algorithm == number:
                return algorithm
        problem = f"CHAP_A={shown(text)} was not offered"
        raise ProtocolViolation(LoginResponse.name, problem, section=_SECTION)

    def verify(self, received: Mapping[str, str]) -> None:
        """The target's last CHAP keys: none without mutual CHAP, else its name and response."""
        keys = _Keys(received, LoginResponse.name)
        if self._target is not None:
            self._verify_target(keys, self._target)
        keys.finish()

    def _verify_target(self, keys: _Keys, target: Credentials) -> None:
        if not keys.has("CHAP_R"):
            raise AuthenticationFailed(
                "login: the target did not prove its identity (mutual CHAP)",
                advice="configure outgoing CHAP at the target, or leave mutual_user= out",
            )
        name, response = keys.take("CHAP_N"), keys.take_response(self._algorithm)
        ours = (self._algorithm, self._identifier, self._credentials.secret, self._challenge)
        if same(response, chap_response(*ours)):
            raise AuthenticationFailed(
                "login: the target answered with our own secret (mutual CHAP)",
                advice="the two directions need different secrets (RFC 7143 §9.2.1)",
            )
        expected = chap_response(self._algorithm, self._identifier, target.secret, self._challenge)
        if not (same(response, expected) and same(name.encode(), target.user.encode())):
            raise AuthenticationFailed(
                "login: the target failed to prove its identity (mutual CHAP)",
                advice="check mutual_user and its secret",
            )


class ChapTarget:
    """Has the initiator prove who it is; answers its challenge where `outgoing` is configured."""

    def __init__(
        self,
        incoming: Credentials,
        outgoing: Credentials | None,
        algorithms: Sequence[int],
        random_bytes: RandomBytes,
        challenges: ChallengeRegister | None = None,
    ) -> None:
        self._sent = ChallengeRegister() if challenges is None else challenges
        self._incoming = incoming
        self._outgoing = outgoing
        self._algorithms = frozenset(algorithms)
        self._random_bytes = random_bytes
        self._algorithm = ChapAlgorithm.MD5
        self._identifier = 0
        self._challenge = b""

    def challenge(self, received: Mapping[str, str]) -> list[Pair]:
        """The initiator's CHAP_A to the challenge; the first algorithm that we know too."""
        keys = _Keys(received, LoginRequest.name)
        proposed = [parse_number(item) for item in keys.take("CHAP_A").split(",")]
        keys.finish()
        known = (number for number in proposed if number in self._algorithms)
        number = next(known, None)
        if number is None:
            raise self._failure("no CHAP algorithm in common")
        self._algorithm = ChapAlgorithm(number)
        self._identifier, self._challenge = _challenge(self._algorithm, self._random_bytes)
        self._sent.add(self._challenge)
        return [
            ("CHAP_A", str(number)),
            ("CHAP_I", str(self._identifier)),
            ("CHAP_C", encode_binary(self._challenge)),
        ]

    def verify(self, received: Mapping[str, str]) -> list[Pair]:
        """The initiator's response, and perhaps its challenge, to our answer to that."""
        keys = _Keys(received, LoginRequest.name)
        name, response = keys.take("CHAP_N"), keys.take_response(self._algorithm)
        mutual = keys.has("CHAP_I") or keys.has("CHAP_C")
        identifier = keys.take_identifier() if mutual else 0
        challenge = keys.take_binary("CHAP_C") if mutual else b""
        keys.finish()
        self._check(name, response)
        return self._prove(identifier, challenge) if mutual else []

    def _check(self, name: str, response: bytes) -> None:
        algorithm, identifier = self._algorithm, self._identifier
        if self._outgoing is not None:
            secret = self._outgoing.secret
            if same(response, chap_response(algorithm, identifier, secret, self._challenge)):
                raise self._failure("the initiator answered with the target's own secret")
        expected = chap_response(algorithm, identifier, self._incoming.secret, self._challenge)
        if not (same(response, expected) and same(name.encode(), self._incoming.user.encode())):
            raise self._failure("wrong CHAP name or secret")

    def _prove(self, identifier: int, challenge: bytes) -> list[Pair]:
        if self._outgoing is None:
            raise self._failure("the initiator asks for mutual CHAP, which is not configured")
        if challenge in self._sent:
            # Of this connection or of another one: §9.2.1 knows an attack with each.
            raise self._failure("the initiator reflects the target's CHAP challenge")
        response = chap_response(self._algorithm, identifier, self._outgoing.secret, challenge)
        return [("CHAP_N", self._outgoing.user), ("CHAP_R", encode_binary(response))]

    def _failure(self, message: str) -> Exception:
        return status_error(LoginStatus.AUTHENTICATION_FAILURE, f"login: {message}")

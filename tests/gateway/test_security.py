"""Keys, what they open, and that they stay secret; TLS."""

import asyncio
import logging
import re
import ssl
import subprocess

import httpx
import pytest

from forge_jax import client, errors
from forge_jax.gateway import client as gateway_client
from forge_jax.gateway import scripted, server


def user(text):
  return {"role": "user", "content": text}


async def test_every_live_route_but_health_needs_a_key(start, smollm2):
  h = await start(smollm2)
  keys = await h.open("s")
  routes = {
    (route.method, route.resource.canonical)
    for route in h.gateway._runner.app.router.routes()
  }
  assert len(routes) > 30
  for method, path in sorted(routes):
    wrong = ["", "wrong", keys.api_key[:-1], "ключ"]
    if path.startswith(("/admin", "/sessions", "/metrics")):
      wrong.append(keys.api_key)
    else:
      wrong += [keys.control_key, h.gateway.admin_token]
    for key in wrong:
      named = path.replace("{id}", "s").replace("{key}", key or "-")
      url = h.gateway.url + re.sub(r"\{[^}]*\}", "m", named)
      for headers in (
        {"Authorization": f"Bearer {key}"},
        {"x-api-key": key},
        {},
      ):
        headers = {} if "/s/" in url else headers
        async with h.http.request(
          method, url, json={}, headers=headers
        ) as reply:
          expected = 200 if path in ("/", "/health") else 401
          assert reply.status == expected, (method, path, key)


async def test_a_control_key_opens_its_own_session_only(start, smollm2):
  h = await start(smollm2)
  one, two = await h.open("one"), await h.open("two")
  for key, status in ((two.control_key, 401), (one.control_key, 200)):
    async with h.http.post(
      f"{h.gateway.url}/sessions/one/close",
      headers={"Authorization": f"Bearer {key}"},
    ) as reply:
      assert reply.status == status


async def test_no_secret_is_logged(start, smollm2, caplog):
  caplog.set_level(logging.DEBUG)
  h = await start(smollm2)
  keys = await h.open()
  secrets = [keys.api_key, keys.control_key, h.gateway.admin_token]
  h.say("fine")
  await h.chat(keys, [user("?")])
  await h.post(keys, {"messages": [user("the script has ended")]})
  await h.post(keys, {"messages": 1}, f"/s/{keys.api_key}/v1/messages")
  host, port = h.gateway.url.removeprefix("http://").split(":")
  for secret in secrets:  # in a header that cannot be parsed
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(
      b"GET /health HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer "
      + f"{secret}\x01\r\n\r\n".encode()
    )
    assert b"400" in await reader.readline()
    writer.close()
  assert "the script has ended" not in caplog.text
  assert "Error handling request" in caplog.text
  config = server.GatewayConfig(admin_token="verysecret")
  shown = caplog.text + repr(keys) + repr(config)
  for secret in (*secrets, "verysecret"):
    assert secret not in shown


def test_it_listens_to_this_machine_only_unless_told():
  assert server.GatewayConfig().host == "127.0.0.1"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
  """A certificate of 127.0.0.1 that signs itself, and its key."""
  folder = tmp_path_factory.mktemp("tls")
  cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
  subprocess.run(
    [
      *("openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"),
      *("-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=gateway"),
      *("-addext", "subjectAltName=IP:127.0.0.1"),
      *("-keyout", key, "-out", cert),
    ],
    check=True,
    capture_output=True,
  )
  return cert, key


def test_tls(certificate):
  cert, key = certificate
  config = server.GatewayConfig(tls_cert=cert, tls_key=key)
  with scripted.serve(["hello"], config=config) as gateway:
    assert gateway.url.startswith("https://127.0.0.1:")
    with client.open_session(
      gateway.url, gateway.admin_token, "s", ca_file=cert
    ) as session:
      reply = httpx.post(
        f"{session.base_url}/chat/completions",
        json={"model": "m", "messages": [user("?")]},
        headers={"Authorization": f"Bearer {session.api_key}"},
        verify=ssl.create_default_context(cafile=cert),
      ).json()
      assert reply["choices"][0]["message"]["content"] == "hello"
    assert len(session.completions) == 1
    asyncio.run(asynchronous_client(gateway, cert))
    # Without the certificate nobody is trusted; without TLS nobody is heard.
    with pytest.raises(errors.GatewayError, match="CERTIFICATE_VERIFY_FAILED"):
      client.open_session(gateway.url, gateway.admin_token, "t").__enter__()
    with pytest.raises(httpx.HTTPError):
      httpx.get(gateway.url.replace("https", "http") + "/health")


async def asynchronous_client(gateway, cert):
  admin = gateway_client.GatewayClient(
    gateway.url, gateway.admin_token, ca_file=cert
  )
  keys = await admin.open_session("async", seed=0)
  assert keys.base_url.startswith("https://")
  assert await admin.close_session("async") == ((), ())
  await admin.aclose()


def test_certificates_that_cannot_be_used(certificate, tmp_path):
  cert, key = certificate
  with pytest.raises(errors.ConfigError, match="one is missing"):
    server.GatewayConfig(tls_cert=cert)
  (tmp_path / "junk.pem").write_text("junk")
  for pair in ((cert, cert), (key, key), (str(tmp_path / "junk.pem"), key)):
    config = server.GatewayConfig(tls_cert=pair[0], tls_key=pair[1])
    with pytest.raises(errors.ConfigError, match="no certificate and its key"):
      server.Gateway(None, scripted.byte_tokenizer(), config)

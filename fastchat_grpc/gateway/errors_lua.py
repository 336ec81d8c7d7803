"""The filter that gives every error of the HTTP side OpenAI's shape: the services' own, and Envoy's.

The services' statuses reach it as the transcoder's JSON of google.rpc.Status, whose members have a fixed
order. It is rendered from the tables that shape errors within streams, so both read alike.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastchat_grpc.rpc.http_errors import CODE_BY_REASON, PARAM_BY_REASON, TYPE_BY_STATUS

MESSAGES: Mapping[int, str] = {
    404: "no such path; see the API's documentation",
    405: "this path does not take this HTTP method",
    408: "the request did not arrive in time",
    413: "body: must have at most {max_body_bytes} bytes",
    415: "the content type must be application/json",
    429: "too many requests; try again later",
    500: "the server failed",
    502: "the server's answer was broken",
    503: "no controller or worker can be reached now; try again later",
    504: "the server gave no sign of life in time",
}
"""What Envoy's own errors say, where they say nothing themselves."""

_SOURCE = r"""
local TYPES = {%(types)s}
local CODES = {%(codes)s}
local PARAMS = {%(params)s}
local MESSAGES = {%(messages)s}
-- What Envoy says itself that helps nobody; and statuses whose own words never do.
local VAGUE = {[""] = true, ["upstream request timeout"] = true, ["stream timeout"] = true,
  ["no healthy upstream"] = true}
local OURS = {[408] = true, [413] = true}

-- Only the first line: the transcoder shows the place of a mistake in further ones.
local function escape(text)
  text = text:match("[^\r\n]*"):gsub("[\127-\255]", "?")
  return (text:gsub('[%%z\1-\31\\"]', function(c) return string.format("\\u%%04x", c:byte()) end))
end

local function quoted(text)
  if text == nil or text == "" then return "null" end
  return '"' .. text .. '"'
end

-- The JSON string, still escaped, that begins where the marker ends.
local function string_after(text, marker)
  local _, last = text:find(marker, 1, true)
  local at = last and last + 1
  while at do
    local found = text:find('[\\"]', at)
    if found == nil then return nil end
    if text:sub(found, found) == '"' then return text:sub(last + 1, found - 1) end
    at = found + 2  -- an escape: the character after the backslash is no end
  end
end

function envoy_on_request(handle)
  local content_type = handle:headers():get("content-type") or ""
  if content_type:sub(1, 16) == "application/grpc" then
    handle:streamInfo():dynamicMetadata():set("fastchat_grpc", "grpc", true)
  end
end

function envoy_on_response(handle)
  local ours = handle:streamInfo():dynamicMetadata():get("fastchat_grpc")
  if ours and ours["grpc"] then return end
  handle:headers():remove("grpc-status")
  handle:headers():remove("grpc-message")
  handle:headers():remove("grpc-status-details-bin")
  local status = tonumber(handle:headers():get(":status"))
  if not status or status < 400 then return end
  local body = handle:body(true)
  local text = ""
  if body and body:length() > 0 then text = body:getBytes(0, body:length()) end
  if text:sub(1, 9) == '{"error":' then return end
  local message = text:match('^{"code":%%d+,"message":"(.*)","details":%%[')  -- JSON-escaped already
  if message == nil then message = text:match('^{"code":%%d+,"message":"(.*)"}$') end
  local reason, field = nil, nil
  if message ~= nil then
    reason = text:match('"reason":"([%%u%%d_]+)"')
    field = string_after(text, '"field":"')
  elseif not VAGUE[text] then
    message = escape(text:sub(1, 300))
  end
  if OURS[status] then message = MESSAGES[status] end
  if status == 413 then field = "body" end
  if message == nil or message == "" then message = MESSAGES[status] or ("HTTP status " .. status) end
  local code = reason and (CODES[reason] or reason:lower()) or nil
  if field == nil and reason then field = PARAMS[reason] end
  local answer = '{"error":{"message":"' .. message .. '","type":"' .. (TYPES[status] or "server_error")
    .. '","param":' .. quoted(field) .. ',"code":' .. quoted(code) .. '}}'
  -- Asked for anew: what was got before the body was waited for may not be used after.
  if body then handle:headers():replace("content-length", tostring(body:setBytes(answer))) end
  handle:headers():replace("content-type", "application/json")
end
"""


def source(max_body_bytes: int) -> str:
    """The filter's Lua code."""
    messages = {status: text.format(max_body_bytes=max_body_bytes) for status, text in MESSAGES.items()}
    return (
        _SOURCE
        % {
            "types": _numbers(TYPE_BY_STATUS),
            "codes": _names(CODE_BY_REASON),
            "params": _names(PARAM_BY_REASON),
            "messages": _numbers(messages),
        }
    ).lstrip()


def _numbers(table: Mapping[int, str]) -> str:
    return ", ".join(f'[{key}] = "{value}"' for key, value in table.items())


def _names(table: Mapping[str, str]) -> str:
    return ", ".join(f'["{key}"] = "{value}"' for key, value in table.items())

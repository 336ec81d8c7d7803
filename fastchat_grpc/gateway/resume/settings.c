#include "settings.h"

#include <stdlib.h>
#include <string.h>

/* The first word of a text, which is left without it. */
static Text next_word(Text *text) {
    const char *space = memchr(text->data, ' ', text->size);
    Text word = {text->data, space ? (size_t)(space - text->data) : text->size};
    size_t used = space ? word.size + 1 : word.size;
    text->data += used;
    text->size -= used;
    return word;
}

static uint64_t number(Text text) {
    uint64_t value = 0;
    for (size_t i = 0; i < text.size && text.data[i] >= '0' && text.data[i] <= '9'; i++)
        value = value * 10 + (uint64_t)(text.data[i] - '0');
    return value;
}

static void read_line(Settings *settings, Text line) {
    Text key = next_word(&line);
    if (text_is(key, "controller") && settings->count < MOST_CONTROLLERS) {
        settings->workers[settings->count] = next_word(&line);
        settings->controllers[settings->count++] = line;
    } else if (text_is(key, "authorization")) {
        settings->authorization = line;
    } else if (text_is(key, "farewell")) {
        settings->farewell = line;
    } else if (text_is(key, "farewell_end")) {
        settings->farewell_end = line;
    } else if (text_is(key, "state")) {
        settings->state = number(line);
    } else if (text_is(key, "message")) {
        settings->message = number(line);
    } else if (text_is(key, "parked")) {
        settings->parked = number(line);
    } else if (text_is(key, "unread")) {
        settings->unread = number(line);
    } else if (text_is(key, "ask_ms")) {
        settings->ask_ms = number(line);
    }
}

bool settings_read(Settings *settings, Text text) {
    *settings = (Settings){.text = malloc(text.size + 1)};
    if (settings->text == NULL) return false;
    memcpy(settings->text, text.data, text.size);
    Text rest = {settings->text, text.size};
    while (rest.size) {
        const char *end = memchr(rest.data, '\n', rest.size);
        Text line = {rest.data, end ? (size_t)(end - rest.data) : rest.size};
        size_t used = line.size + (end != NULL);
        read_line(settings, line);
        rest = (Text){rest.data + used, rest.size - used};
    }
    return settings->count && settings->state && settings->message && settings->parked && settings->unread &&
           settings->ask_ms;
}

void settings_free(Settings *settings) { free(settings->text); }

size_t settings_find(const Settings *settings, Text workers) {
    for (size_t i = 0; i < settings->count; i++)
        if (settings->workers[i].size == workers.size &&
            memcmp(settings->workers[i].data, workers.data, workers.size) == 0)
            return i;
    return 0;
}

/* The card file as the simulated driver libraries read it: anew at every call, so that a change shows at once.
 *
 * tests/sim/card.py writes one `"key":value` a line, without escapes, and replaces the file in one step; looking for the
 * quoted key is all the parsing there is to do.
 */
#ifndef EDGEKV_SIM_CARD_H
#define EDGEKV_SIM_CARD_H

#include <stddef.h>
#include <stdint.h>

struct card {
    char text[1 << 16];
};

struct process {
    uint32_t pid;
    uint64_t num_bytes; /* UINT64_MAX: the driver does not say */
    char name[256];
};

enum { MOST_PROCESSES = 64 };

/* Waits for as long as the card hangs, then reads it. 0, or -1 where there is no card at all. */
int card_open(struct card *card);

uint64_t card_number(const struct card *card, const char *key); /* 0 for null */
int card_is(const struct card *card, const char *key);          /* whether it says true */
void card_text(const struct card *card, const char *key, char *to, size_t size);

struct pci {
    unsigned domain, bus, device, function;
};

int pci_parse(const char *text, struct pci *to); /* 0, or -1 */
void card_pci(const struct card *card, struct pci *to);

/* Who holds memory of the card and computes / draws on it; the number of processes. The process under test computes;
 * the others draw, and those in both_lists do both. `processes` has room for MOST_PROCESSES. */
size_t card_computing(const struct card *card, struct process *processes);
size_t card_drawing(const struct card *card, struct process *processes);

#endif

// SPDX-License-Identifier: GPL-2.0
/*
 * A guest's CPU in a process of its own: maps and unmaps with the module's
 * units.c. guest.ts is its twin in TypeScript; arena.ts has the layout.
 */
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "table.h"

#define RAM		(16ul << 20)
#define CONTROL		(8ul << 20)
#define READY		CONTROL
#define DONE		(CONTROL + 64)
#define GONE		(CONTROL + 128)
#define HELD		(CONTROL + 4096)
#define MAILBOXES	(CONTROL + 16 * 4096)

enum { FIRST = 992, FRAMES = 64, FRAMES_PER_MAP_MAX = 4, MAPPINGS = 2 };
enum { IDLE, ASKED, ANSWERED };

struct mailbox { int state, gfn, frames, status; };

struct mapping {
	u64 gfn, frames;
	int held[FRAMES_PER_MAP_MAX];
};

static struct { u64 mapped, unmapped, asked, lost, failed; } totals;
static struct mailbox *box;
static u64 state;

/* xorshift64* */
static u64 next(u64 below)
{
	state ^= state >> 12;
	state ^= state << 25;
	state ^= state >> 27;
	return ((state * 0x2545f4914f6cdd1dull) >> 32) % below;
}

static int load(const void *word)
{
	return __atomic_load_n((const int *)word, __ATOMIC_SEQ_CST);
}

static void store(int *word, int value)
{
	__atomic_store_n(word, value, __ATOMIC_SEQ_CST);
}

static int held(u64 gfn)
{
	return load(shim_ram + HELD + 4 * gfn);
}

static bool ask(u64 gfn, u64 frames)
{
	u64 i;

	totals.asked++;
	store(&box->gfn, gfn);
	store(&box->frames, frames);
	store(&box->state, ASKED);
	while (load(&box->state) != ANSWERED)
		sched_yield();
	store(&box->state, IDLE);
	for (i = 0; i < frames; i++)
		if (!coiommu_dtt_pinned(gfn + i))
			return false;
	return load(&box->status) == 0;
}

static void map(struct mapping *m)
{
	bool asking = false;
	u64 i;

	m->gfn = FIRST + next(FRAMES - FRAMES_PER_MAP_MAX);
	m->frames = 1 + next(FRAMES_PER_MAP_MAX);
	if (coiommu_dtt_get(m->gfn, m->frames, true, &asking)) {
		totals.failed++;
		m->frames = 0;
		return;
	}
	totals.mapped += m->frames;
	if (asking && !ask(m->gfn, m->frames))
		totals.failed++;
	for (i = 0; i < m->frames; i++) {
		m->held[i] = held(m->gfn + i);
		totals.lost += m->held[i] % 2 == 0;
	}
}

static void unmap(struct mapping *m)
{
	u64 i;

	for (i = 0; i < m->frames; i++)
		totals.lost += held(m->gfn + i) != m->held[i];
	totals.unmapped += coiommu_dtt_put(m->gfn, m->frames, true);
	m->frames = 0;
}

/* Arguments: root, levels, processes, id, maps, seed. The RAM is fd 3. */
int main(int argc, char **argv)
{
	static struct mapping mappings[MAPPINGS];
	unsigned int processes, n, maps;
	void *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED, 3, 0);

	if (argc != 7 || ram == MAP_FAILED)
		return 2;
	processes = atoi(argv[3]);
	maps = atoi(argv[5]);
	state = strtoull(argv[6], NULL, 10) + 1;
	native_table(ram, strtoull(argv[1], NULL, 10), atoi(argv[2]), processes);
	box = (struct mailbox *)(shim_ram + MAILBOXES + 64 * atoi(argv[4]));

	atomic_inc_return((atomic_t *)(shim_ram + READY));
	while (load(shim_ram + READY) < (int)processes)
		sched_yield();
	for (n = 0; n < maps || load(shim_ram + DONE) < (int)processes; n++) {
		if (n == maps)
			atomic_inc_return((atomic_t *)(shim_ram + DONE));
		unmap(&mappings[n % MAPPINGS]);
		map(&mappings[n % MAPPINGS]);
	}
	for (n = 0; n < MAPPINGS; n++)
		unmap(&mappings[n]);
	atomic_inc_return((atomic_t *)(shim_ram + GONE));
	printf("{\"mapped\":%llu,\"unmapped\":%llu,\"asked\":%llu,\"lost\":%llu,\"failed\":%llu}\n",
	       totals.mapped, totals.unmapped, totals.asked, totals.lost, totals.failed);
	return 0;
}

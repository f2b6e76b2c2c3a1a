/*
 * coIOMMU's protocol: guest CPUs that map and unmap, a driver that comes and goes, an assigned device, the backend.
 * docs/protocol.md says what it means, why it is safe, and which step is which line of the code; spec/runs.ts has the
 * configurations and the twins.
 *
 *	QUOTA		frames that may be pinned at once
 *	CPUS		that map
 *	MAPPINGS	1: of frame 0; 2: or of frame 1; 3: or of both, as a scatter list does
 *	LIFE		the driver unbinds and binds again, and functions may be reset meanwhile
 *	HOSTILE		instead: a guest that writes what it likes, and a device that accesses what it likes
 *	LIVE		for what must happen at last: passes never cease, and CPUs may stop
 *	REFUSALS	times that the host may refuse something; without it, any number
 *	NO_DMA		no device ever accesses what is mapped
 *	TWIN_...	one way to get it wrong, which the checker must find
 *
 * An `atomic` has one access to what processes share, plus local bookkeeping; where it has more, it says why it may.
 */

#define FRAMES		2
#define bit(f)		(1 << (f))
#define first(set)	(((set) & 1) -> 0 : 1)		/* sets of frames are masks */
#define BOTH		3

/* A tracking unit. abi.md section 1; COUNT is shorter, and nothing uses D and W yet (ADR 4, point 8). */
#define COUNT		15
#define A		64
#define P		128
byte unit[FRAMES];

mtype = { NONE, TAKEN, OK, REFUSED, PIN_ON, PIN_OFF, FUNCTIONS_RESET };

/* The virtio-iommu: frames of the request that is out, what has become of it; a write to pin_control that is out. */
byte asked;
mtype status = NONE;
#define answered	(status == OK || status == REFUSED)
mtype control = NONE;
/* requests.lock and requests.on of pin.c. */
bit locked;
bit on;

/* Pages that the host kernel holds pinned for us; frames that the IOMMU lets devices access. */
byte held = bit(0);
byte allowed = bit(0);

/* The device's DMA window; `closed`: one was closed since the unpinner looked, that is, the sequence has changed. */
bit window;
bit closed;
/* Frames of the mapping that each CPU has handed to the device, until the device is done with it. */
byte job[2];
/* Assigned functions are on the bus. */
#ifdef NO_DMA
bit mastering = 0;
#else
bit mastering = 1;
#endif

/* Times that the host may yet refuse something. */
#ifdef REFUSALS
byte refusals = REFUSALS;
#define may_refuse	refusals > 0 -> refusals--
#else
#define may_refuse	true
#endif

/* Take the first frame out of `todo`; the loop ends with the last one. Local. */
inline next() {
	todo = todo & (todo - 1);
	if
	:: todo == 0 -> break
	:: else
	fi
}

/* ---- guest ------------------------------------------------------------------------------------------------------ */

/* COUNT up; then A, unless the first RMW saw it; P is the one that the first RMW saw. */
inline get(frames) {
	todo = frames;
	do
	::
#ifdef TWIN_TEST_BEFORE_COUNT
	   looked = unit[first(todo)];
#endif
	   atomic {
		seen = unit[first(todo)];
		unit[first(todo)] = seen + 1;
		assert((seen & COUNT) < COUNT);
#ifdef TWIN_TEST_BEFORE_COUNT
		ask = ask || !(looked & P); looked = 0
#else
		ask = ask || !(seen & P)
#endif
	   };
	   if
	   :: atomic { !(seen & A) -> unit[first(todo)] = unit[first(todo)] | A; seen = 0; next() }
	   :: atomic { seen & A -> seen = 0; next() }
	   fi
	od
}

/* COUNT down. */
inline put(frames) {
	todo = frames;
	do
	:: seen = unit[first(todo)];
	   do
#ifdef TWIN_TORN_UNMAP
	   :: atomic { unit[first(todo)] = seen - 1; break }
#else
	   :: atomic { unit[first(todo)] == seen -> unit[first(todo)] = seen - 1; break }
	   :: atomic { unit[first(todo)] != seen -> seen = unit[first(todo)] }
#endif
	   od;
	   atomic { assert(seen & COUNT); seen = 0; next() }
	od
}

/* Ask for those of `frames`, which are counted, that lack P; see P set. `failed` if that cannot be. */
inline pin(frames) {
	atomic { !locked -> locked = 1 };
	if
	:: atomic { !on -> failed = 1 }
	:: atomic { on -> todo = frames };
	   do
	   :: atomic {
		if
		:: !(unit[first(todo)] & P) -> request = request | bit(first(todo))
		:: else
		fi;
		next()
	      }
	   od;
	   if
	   :: request == 0
	   :: else ->
	      asked = request;
	      /* Nobody else touches the queue: `locked`. */
	      atomic { answered -> failed = (status == REFUSED); status = NONE; asked = 0 };
	      if
	      :: failed
	      :: else ->
		 todo = request;
		 do
		 :: atomic { assert(unit[first(todo)] & P); next() }
		 od
	      fi;
	      request = 0
	   fi
	fi;
	locked = 0
}

proctype cpu(bit me) {
	byte frames, todo, seen, request;
	bit ask, failed;
#ifdef TWIN_TEST_BEFORE_COUNT
	byte looked;
#endif
map:
	if
	:: frames = bit(0)
#if MAPPINGS >= 2
	:: frames = bit(1)
#endif
#if MAPPINGS >= 3
	:: frames = BOTH
#endif
#ifdef LIVE
	:: goto stopped
#endif
	fi;
	get(frames);
	if
	:: ask -> ask = 0; pin(frames)
	:: else
	fi;
	if
	:: failed -> failed = 0
	:: else ->
	   job[me] = frames;	/* the device may have the address */
	   job[me] == 0		/* and is done with it */
	fi;
	put(frames);
	frames = 0;
	goto map;
#ifdef LIVE
stopped:
	skip
#endif
}

#ifdef LIFE
inline tell(what) {
	control = what;
	control == NONE
}

/* The driver of the virtio-iommu, bound and unbound. */
proctype driver() {
	byte live, todo, seen, request;
	bit ask, failed;
#ifdef TWIN_TEST_BEFORE_COUNT
	byte looked;
#endif
turn_pin_on:
	tell(PIN_ON);
	atomic { !locked -> on = 1 };
#ifndef TWIN_NO_REASK
	todo = BOTH;
	do
	:: atomic {
		if
		:: unit[first(todo)] & COUNT -> live = live | bit(first(todo))
		:: else
		fi;
		next()
	   }
	od;
ask_again:
	if
	:: live == 0
	:: else ->
	   get(live);
	   if
	   :: ask -> ask = 0; pin(live)
	   :: else
	   fi;
	   put(live);
	   live = 0
	fi;
#endif
	if
	:: failed -> failed = 0
	:: else -> mastering = 1	/* functions that were reset meanwhile may go on */
	fi;
stop:
	atomic { !locked -> on = 0 };
	tell(PIN_OFF);
#ifndef TWIN_KEEP_P
forget:	todo = BOTH;
	do
	/* Load and RMW in one: while PIN is off, nobody else changes P. */
	:: if
	   :: atomic { unit[first(todo)] & P -> unit[first(todo)] = unit[first(todo)] & ~P; next() }
	   :: atomic { !(unit[first(todo)] & P) -> next() }
	   fi
	od;
#endif
	if
	:: true
	:: atomic { !window -> mastering = 0 }; tell(FUNCTIONS_RESET)
	fi;
	goto turn_pin_on
}
#endif

#ifdef HOSTILE
proctype guest() {
	byte f;
	do
	:: atomic {
		if :: f = 0 :: f = 1 fi;
		if
		:: unit[f] = 0
		:: unit[f] = P
		:: unit[f] = P | A
		:: unit[f] = P | 1
		:: unit[f] = 1
		fi;
		f = 0
	   }
	:: atomic { asked == 0 -> if :: asked = bit(0) :: asked = bit(1) :: asked = BOTH fi }
	:: atomic { answered -> status = NONE; asked = 0 }
	:: atomic { control == NONE -> if :: control = PIN_ON :: control = PIN_OFF fi }
	od
}
#endif

/* ---- an assigned device ------------------------------------------------------------------------------------------ */

/* Checks what the IOMMU says of each frame, then accesses: GatedMemory. A job may take several windows. */
proctype device() {
	byte todo;
	bit who;
	do
#ifdef HOSTILE
	:: window = 1;
	   if :: todo = bit(0) :: todo = bit(1) fi;
	   if
	   :: atomic { allowed & todo -> skip };
	      atomic { assert((held & todo) == todo); todo = 0 }
	   :: atomic { !(allowed & todo) -> todo = 0 }	/* refused, and counted as a fault */
	   fi;
	   atomic { window = 0; closed = 1 }
#else
	:: atomic {
		/* Its CPU waits, so that nobody else touches the job. */
		if
		:: mastering && job[0] -> who = 0
		:: mastering && job[1] -> who = 1
		fi;
		window = 1; todo = job[who]
	   };
	   do
	   :: atomic { assert(allowed & bit(first(todo))); next() }
	   od;
	   assert((held & job[who]) == job[who]);
	   atomic { window = 0; closed = 1 };	/* one RMW of the sequence */
	   if
	   :: atomic { job[who] = 0; who = 0 }
#ifndef LIVE
	   :: who = 0
#endif
	   fi
#endif
	od
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

#define size(set)	(((set) & 1) + ((set) >> 1))
/* Between requests and slices, the three agree. */
#define in_step		(ledger == held && allowed == held)

proctype backend() {
	byte ledger = bit(0), own;	/* pinned; of those: claimed by the table that is active */
	byte fresh, todo, claimed, seen, before;
	byte forced;			/* passes left to do for the request that is being served */
	bit tried;
	bit tracking;
#ifndef LIFE
	on = 1; tracking = 1;
#endif

idle:	do
	:: atomic { asked && status == NONE -> assert(in_step); status = TAKEN; before = held; goto serve }
	:: atomic { control == PIN_ON -> assert(in_step); tracking = 1; own = 0; control = NONE }
	:: atomic { control == PIN_OFF -> tracking = 0; own = 0; control = NONE }
	/* Nothing is on the bus, so nobody sees in which order they go. Not built: abi.md section 4, "frozen". */
	:: atomic {
		control == FUNCTIONS_RESET ->
		if
		:: held = 0
		:: held = held & bit(0)
		fi;
		ledger = held; allowed = held; control = NONE
	   }
#ifdef LIVE
	:: atomic { tracking && ledger && !(asked && status == NONE) -> todo = ledger; goto slice }
#else
	:: atomic { tracking && (ledger & bit(0)) -> assert(in_step); todo = bit(0); goto slice }
	:: atomic { tracking && (ledger & bit(1)) -> assert(in_step); todo = bit(1); goto slice }
	:: atomic { tracking && ledger == BOTH -> assert(in_step); todo = BOTH; goto slice }
#endif
	od;

	/* ---- a PIN request ---- */
serve:	if
	:: !tracking -> goto refuse
	:: else
	fi;
#ifdef TWIN_SET_BEFORE_PIN
	todo = asked;
	do
	:: atomic { unit[first(todo)] = unit[first(todo)] | P; next() }
	od;
#endif
pin_fresh:
#ifdef TWIN_BELIEVE_P
	fresh = asked & ~(((unit[0] & P) -> 1 : 0) | ((unit[1] & P) -> 2 : 0)) & ~ledger;
#else
	fresh = asked & ~ledger;
#endif
	if
#ifndef TWIN_NO_QUOTA
	:: size(ledger | fresh) > QUOTA -> goto tight
#endif
	:: else
	fi;
	if
	:: fresh == 0 -> goto set_pinned
	:: else -> todo = fresh
	fi;
pin_pages:
	do
	:: atomic { held = held | bit(first(todo)); assert(size(held) <= QUOTA); next() }
	/* Pages that are not in the IOMMU yet are seen by nobody: they go at once. */
	:: atomic {
		may_refuse;
#ifndef TWIN_KEEP_PART
		held = held & ~fresh;
#endif
		todo = 0; fresh = 0;
		if
		:: goto tight		/* ENOMEM */
		:: goto refuse
		fi
	   }
	od;
	ledger = ledger | fresh;
	todo = fresh;
allow:	do
	:: atomic { allowed = allowed | bit(first(todo)); next() }
	od;
set_pinned:
	atomic { fresh = 0; own = own | asked; todo = asked };
#ifdef TWIN_ANSWER_FIRST
	status = OK;
#endif
	do
	:: atomic { unit[first(todo)] = unit[first(todo)] | P; next() }
	od;
#ifndef TWIN_ANSWER_FIRST
	atomic { assert((held & asked) == asked); status = OK };
#endif
	goto served;

tight:	atomic {
		fresh = 0;
		if
		:: tried || ledger == 0 -> goto refuse
		:: else -> tried = 1; forced = 2; todo = ledger; goto slice
		fi
	};
refuse:	atomic {
		assert((held & ~before) == 0);
#ifndef TWIN_LOSE_REFUSAL
		status = REFUSED
#endif
	};
served:	atomic {
		tried = 0; before = 0;
#ifdef LIVE
		if
		:: tracking && ledger -> todo = ledger; goto slice
		:: else -> goto idle
		fi
#else
		goto idle
#endif
	};

	/* ---- a slice of an unpin pass: the frames of `todo`, which are in the ledger ---- */
slice:	do
	:: seen = unit[first(todo)];
	   if
	   :: atomic {
		!(seen & P) ->
		if
#ifdef TWIN_FOREIGN_IGNORES_COUNT
		:: !(own & bit(first(todo))) ->
#else
		:: !(own & bit(first(todo))) && !(seen & COUNT) ->
#endif
		   claimed = claimed | bit(first(todo))
		:: else
		fi;
		seen = 0; next()
	      }
#ifdef TWIN_IGNORE_COUNT
	   :: atomic {
		seen & P && !(seen & A) ->
#else
	   :: atomic {
		seen == P ->
#endif
#ifdef TWIN_TORN_CLAIM
		unit[first(todo)] = 0; claimed = claimed | bit(first(todo));
#else
		if
		:: unit[first(todo)] == seen ->
#ifndef TWIN_CLEAR_AFTER_RELEASE
		   unit[first(todo)] = seen & ~P;
#endif
		   claimed = claimed | bit(first(todo))
		:: else
		fi;
#endif
		seen = 0; next()
	      }
	   :: atomic {
		seen & P && seen & A ->
#ifndef TWIN_NO_AGEING
		unit[first(todo)] = unit[first(todo)] & ~A;
#endif
		seen = 0; next()
	      }
#ifndef TWIN_IGNORE_COUNT
	   :: atomic { seen & P && !(seen & A) && seen & COUNT -> seen = 0; next() }
#endif
	   fi
	od;
	if
	:: claimed == 0 -> goto slice_done
	:: else -> todo = claimed
	fi;
revoke:	do
	:: atomic { allowed = allowed & ~bit(first(todo)); next() }
	od;
#ifndef TWIN_NO_QUIESCE
quiesce:
	closed = !window;
	if
	:: closed
	:: atomic { may_refuse; goto take_back }	/* it stays open for too long */
	fi;
#endif
	todo = claimed;
release:
	do
	:: atomic {
		assert(!((job[0] | job[1]) & bit(first(todo))));
		held = held & ~bit(first(todo));
		ledger = ledger & held; own = own & held; claimed = claimed & held;
		next()
	   }
	:: atomic { may_refuse; break }
	od;
#ifdef TWIN_CLEAR_AFTER_RELEASE
	todo = BOTH & ~held;
	do
	:: todo == 0 -> break
	:: else -> atomic { unit[first(todo)] = unit[first(todo)] & ~P; next() }
	od;
#endif
take_back:
	if
	:: claimed == 0 -> goto slice_done
	:: else -> todo = claimed
	fi;
#ifndef TWIN_KEEP_REVOKED
	do
	:: atomic { allowed = allowed | bit(first(todo)); next() }
	od;
#endif
#ifndef TWIN_KEEP_P_CLEAR
	todo = claimed & own;
	do
	:: todo == 0 -> break
	:: else -> atomic { unit[first(todo)] = unit[first(todo)] | P; next() }
	od;
#endif
slice_done:
	atomic {
		claimed = 0; todo = 0;
		if
		:: forced > 1 && ledger -> forced--; todo = ledger; goto slice
		:: forced && ledger == before -> forced = 0; goto refuse
		:: forced && ledger != before -> forced = 0; goto pin_fresh
		:: forced == 0 -> goto idle
		fi
	}
}

init {
	atomic {
		run backend();
		run device();
#ifdef HOSTILE
		run guest();
#else
		run cpu(0);
#if CPUS == 2
		run cpu(1);
#endif
#endif
#ifdef LIFE
		run driver();
#endif
	}
}

#ifdef LIVE
/* Every request is answered. */
ltl answered_at_last { []<> (asked == 0) }
/* What is idle is unpinned: frame 0 is mapped or not pinned, again and again. */
ltl unpinned_at_last { []<> ((unit[0] & COUNT) || !(held & bit(0))) }
#endif

// Work on many things, a few at a time; all of it waits when the service says so.

/** Answers what is added, in order, at most `parallel` at once. */
export class Queue {
  #work;
  #parallel;
  #waiting = [];
  #running = 0;
  #timer = null;
  #resumeAt = 0;
  #locked = false;

  /** @param {(item: object) => Promise<void>} work handles its own failures. */
  constructor(work, parallel) {
    this.#work = work;
    this.#parallel = parallel;
  }

  add(items) {
    this.#waiting.push(...items);
    this.#start();
  }

  /** Put something back that must be done again before what still waits. */
  addFirst(item) {
    this.#waiting.unshift(item);
    this.#start();
  }

  /** Start nothing for some time; the longest of several times counts. */
  pause(seconds) {
    const resumeAt = Date.now() + 1000 * seconds;
    if (resumeAt <= this.#resumeAt) return;
    this.#resumeAt = resumeAt;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      this.#timer = null;
      this.#start();
    }, 1000 * seconds);
  }

  /** Start nothing until unlocked. */
  lock() {
    this.#locked = true;
  }

  unlock() {
    this.#locked = false;
    this.#start();
  }

  /** Forget what waits; what runs is for its owner to abort. */
  clear() {
    this.#waiting = [];
  }

  #start() {
    while (!this.#locked && !this.#timer && this.#running < this.#parallel && this.#waiting.length) {
      this.#running += 1;
      this.#work(this.#waiting.shift()).finally(() => {
        this.#running -= 1;
        this.#start();
      });
    }
  }
}

"""base_train for tests that stop it: from step `at` on, each step takes `seconds` more, so that the signal comes before the end however busy the machine is

python tests/slow_base_train.py AT SECONDS [flags of base_train]"""
import runpy, sys, time
import nanochat.train as tr

at, seconds, real = int(sys.argv.pop(1)), float(sys.argv.pop(1)), tr.Loop.one_step

def one_step(self):
    if self.step >= at: time.sleep(seconds)
    return real(self)

tr.Loop.one_step = one_step
runpy.run_module('nanochat.scripts.base_train', run_name='__main__', alter_sys=True)

"All package metadata comes from settings.ini, so that it is written once."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=['='])
cfg.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
extras = {k[:-len('_requirements')]: v.split() for k, v in cfg.items() if k.endswith('_requirements')}
extras['dev'] = sorted({r for rs in extras.values() for r in rs})  # a developer needs all of them
statuses = {'1': 'Planning', '2': 'Pre-Alpha', '3': 'Alpha', '4': 'Beta', '5': 'Production/Stable', '6': 'Mature', '7': 'Inactive'}

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=(Path(__file__).parent/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=['tokbook', 'tokbook.*']), include_package_data=True, zip_safe=False,
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': cfg.get('console_scripts', '').split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    project_urls={'Book': cfg['doc_host']+cfg['doc_baseurl'], 'Source': cfg['git_url']},
    classifiers=[f"Development Status :: {cfg['status']} - {statuses[cfg['status']]}", 'Intended Audience :: Developers',
                 f"Natural Language :: {cfg['language']}", 'Programming Language :: Python :: 3', 'License :: OSI Approved :: Apache Software License'])
